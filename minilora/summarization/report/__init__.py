"""What a person reads: the terminal's text and report.html."""
