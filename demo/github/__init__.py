"""GitHub on this machine: the part of its REST and GraphQL API that the bot uses, over real git repositories.

For the demo and the tests. Clients are pointed at it with `base_url` (PyGithub) or `GITHUB_API_URL` (the action), unchanged.
What is refused, counted, paged and cut off follows https://docs.github.com/en/rest.
"""
