"""What TreeRPOTrainer is built on: TRL's GRPOTrainer, changed in one respect at a time."""
