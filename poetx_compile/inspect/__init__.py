"""What a user looks at: the rewritten graphs, memory, diagnostics, the command line."""
