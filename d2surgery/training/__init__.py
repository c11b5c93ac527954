"""Fine-tuning with the four kinds: settings, data, and a loop that is transformers' Trainer."""
