"""What the two LLM judges share: questions to a chat endpoint, templates, and how answers are read."""
