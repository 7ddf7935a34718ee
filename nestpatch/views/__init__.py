"""How results look in a terminal. The only package that draws."""
