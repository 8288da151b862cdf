"""How a split is carried out on the model: parameters, modules, hooks and guards."""
