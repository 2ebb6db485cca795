"""Files of the two earlier projects, brought into today's formats."""
