"""Three small verifiable tasks (text, image, video) and the tiny Qwen3-VL that learned to half solve them."""
