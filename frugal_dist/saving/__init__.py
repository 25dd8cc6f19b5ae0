"""How the optimizer is saved torch's way: its state_dict, torch.distributed.checkpoint, copies and pickles."""
