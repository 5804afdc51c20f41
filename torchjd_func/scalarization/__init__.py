"""Methods that turn the losses into one loss: one family, one file; see `jd.scalarizers`."""
