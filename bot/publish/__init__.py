"""From a build's folder to the Hub: every file uploaded first, then one commit a repository, then the tag, then a check.

contents.py     what a release holds, by repository; files that were uploaded already and deleted here
lock.py         moerge.lock.json: the identity of a release and the checksum of every file in it
readme.py       what people wrote into the card on the Hub stays
repository.py   one repository: the commit planned, uploaded, committed once whatever happens, tagged, verified
patience.py     which failures pass, and one sentence for each that does not
tokens.py       a token for each repository: GitHub's identity exchanged for one, or HF_TOKEN
settings.py     visibility, gating, collection, the previous model's card
release.py      all of it in order
"""

from bot.publish.contents import RECIPE
from bot.publish.lock import LOCK, gguf_repository, tag_name
from bot.publish.release import Publication, publish
from bot.publish.repository import RepositoryChange

__all__ = ["LOCK", "RECIPE", "Publication", "RepositoryChange", "gguf_repository", "publish", "tag_name"]
