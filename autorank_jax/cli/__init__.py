"""The command line: parsing, commands, live display, tables, figures and files."""
