"""Read-only views of a run, made from its tables: nothing in them is needed to run or resume."""
