"""4-bit and 8-bit storage of frozen weights. Nothing is built here yet: `finetune check` refuses `quantize.scheme`."""
