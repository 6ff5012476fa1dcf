"""One file per algorithm: hyper-parameters plus a pure loss."""
