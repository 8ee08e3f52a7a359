"""The demo: a tiny language model of film reviews, a reward, a judge and value heads, all of them package data."""
