"""Configs of Axolotl, LLaMA-Factory, TRL and Unsloth as recipes. Words of theirs are in `config.other_tools`."""
