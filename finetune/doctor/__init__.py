"""What will run on this machine, why not the better thing, and whether it is right: `finetune doctor`."""
