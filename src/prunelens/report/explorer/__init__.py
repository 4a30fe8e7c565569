"""The feature explorer: which features were lost, kept, or came anew, on one page.

`content`: what it shows, as arrays; `collect`: a study's artifacts -> content; `folder`: content ->
a static folder of shards and the page; `server`: that folder at a loopback address.
"""
