"""From files and hub data sets to padded batches."""
