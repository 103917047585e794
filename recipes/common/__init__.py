"""What the stages share: arguments, the policy, sampling, run directories, statistics and the report's page."""
