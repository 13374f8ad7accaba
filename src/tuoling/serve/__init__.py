"""A model for many callers at once: continuous batching, and OpenAI's API over it."""
