"""Where the text comes from that is trained on: the data set, or a writer in its place."""
