"""The Gradio demo: look at an equilibrium being found. `app.py` starts it."""
