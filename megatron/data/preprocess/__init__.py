"""Text files to token files: find inputs, cut them into shards, encode the shards in workers, join the parts."""
