"""How prompts and decode rows share a device: what each way costs, and which one a step takes."""
