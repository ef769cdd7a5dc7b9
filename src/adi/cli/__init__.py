"""The command line: one sub-command per verb, and the only place where the stages meet."""
