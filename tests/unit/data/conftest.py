from hypothesis import settings

# A busy machine must not fail a test: hypothesis would by default, where one example takes 0.2 s.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
