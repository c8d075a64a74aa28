"""Each script and the Space in processes of their own, with the newest and the oldest releases."""
