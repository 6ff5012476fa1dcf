"""One file per way to turn judged groups into pairs."""
