"""Answers that are held to a form: from a StructuredOutput to the masks of the tokens that may come next."""
