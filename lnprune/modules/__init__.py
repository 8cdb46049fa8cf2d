"""What meets modules of torch: which parameters, how they are registered, and all or nothing."""
