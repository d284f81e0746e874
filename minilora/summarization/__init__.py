"""The task: fine-tune an encoder-decoder to summarize dialogues, and measure what it gained."""
