"""The FastDeploy plugin."""
