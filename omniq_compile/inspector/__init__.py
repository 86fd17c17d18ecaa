"""What ``omniq dump`` shows: a model at every stage of compiling, as data and in four formats."""
