"""What is in a model: FFNs, attentions, linears, found and read. Nothing here changes one."""
