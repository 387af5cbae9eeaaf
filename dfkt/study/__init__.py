"""Many runs as one study, on Ray Tune and Optuna: the only package that knows Ray."""
