"""Run a model under observation and say what happened to its gradients."""
