"""Which recipe suits some data: what the data are, what each recipe is for, and the command that runs it on them."""
