"""One file a workload: whole models, fastgen beside the same model in plain torch."""
