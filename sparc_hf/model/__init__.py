"""The SPARC and USAE models. Its files import each other only: a pushed model takes them all along."""
