//! `up` and `down`: what a workspace's `fermata.toml` declares.

use std::path::PathBuf;

use clap::Args;
use fermata_protocol::AgentName;

/// Which file, and which of its agents.
#[derive(Debug, Clone, Args)]
pub struct DeclaredArgs {
    /// Only these agents; all when left out.
    #[arg(value_name = "AGENT")]
    pub agents: Vec<AgentName>,
    /// The file; the nearest fermata.toml here or above, up to the home directory, when left out.
    #[arg(long, short, value_name = "FILE")]
    pub file: Option<PathBuf>,
}

/// Arguments of `up`.
#[derive(Debug, Args)]
pub struct UpArgs {
    #[command(flatten)]
    pub declared: DeclaredArgs,
    /// Check the file and say what would be done.
    #[arg(long)]
    pub dry_run: bool,
    /// Wait until every agent is ready or completed; exit code 1 when one failed.
    #[arg(long, short, conflicts_with = "dry_run")]
    pub wait: bool,
    /// Stop running agents whose declaration has changed, and start them anew.
    #[arg(long)]
    pub recreate: bool,
    /// Stop agents that run in the project and are not in the file.
    #[arg(long, conflicts_with = "agents")]
    pub remove_orphans: bool,
}

/// Arguments of `down`.
#[derive(Debug, Args)]
pub struct DownArgs {
    #[command(flatten)]
    pub declared: DeclaredArgs,
    /// Remove the agents as well, once they have ended; checkpoints stay.
    #[arg(long)]
    pub remove: bool,
    /// Pause the whole project and free its memory instead, so that 'resume' brings the agents back.
    #[arg(long, conflicts_with_all = ["remove", "agents"])]
    pub pause: bool,
}
