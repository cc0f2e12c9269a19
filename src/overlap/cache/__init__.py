"""Who owns which page of KV memory. Decides only; imports no torch."""
