"""Message formats: from a conversation to token ids and back."""
