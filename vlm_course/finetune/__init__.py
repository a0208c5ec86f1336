"""Fine-tuning `Llava` on one GPU or many: LoRA, data, the engine and its speed. Chapter 10 shows it."""
