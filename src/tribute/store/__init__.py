"""Where evaluations are kept: a SQL database, and its exchange with flat files."""
