"""Split training between two processes: what each half does, apart from how it is carried."""
