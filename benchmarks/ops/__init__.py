"""One file an op family: its cases, its peers, and what their outputs must equal before anything is timed."""
