"""How the two shipped encoders were made and measured."""
