"""
A finished model on the Hugging Face hub, from where `sample.py --checkpoint NAME/MODEL` takes it.
"""

from huggingface_hub import HfApi

from support.common import UserError, one_line
from support.finished import PARTS

UPLOADED = [*PARTS, "scheduler/*", "README.md", "progress.png", "validation-*.png", "sample.gif"]


def check_login():
    """Raises UserError unless somebody is logged in: said before a training, not after it."""
    try:
        HfApi().whoami()
    except (OSError, ValueError) as error:  # HTTP errors are OSErrors
        how = "`hf auth login` once, or the environment variable HF_TOKEN"
        raise UserError(f"--push_to_hub: the hub knows nobody here ({one_line(error)}): {how}.") from error


def push(args, main):
    """Uploads the finished folder args.output_dir, its model card with it, if --push_to_hub asks for it; from
    the main process alone. Raises UserError, which leaves the folder as it is."""
    if not (args.push_to_hub and main):
        return
    name, api = args.hub_model_id or args.output_dir.name, HfApi()
    try:
        repo = api.create_repo(name, exist_ok=True)
        folder = dict(folder_path=args.output_dir, allow_patterns=UPLOADED)
        api.upload_folder(repo_id=repo.repo_id, **folder, commit_message="Trained with train.py")
    except (OSError, ValueError) as error:
        again = f"`hf upload {name} {args.output_dir}` tries again"
        raise UserError(f"--push_to_hub failed ({one_line(error)}); the model is whole, {again}.") from error
    print(f"pushed to {repo}")
