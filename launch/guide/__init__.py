"""Commands that explain the others: a first configuration file, choices and keys, completion in a shell."""
