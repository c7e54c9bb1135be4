//! A workspace's `fermata.toml`: the project and the agents that it declares.
//!
//! ```text
//!   place ─► text ─► tree ─► section by section ─► Declaration
//!                      │            │      ▲
//!                      └─ problems ◄┘      order: names, circles
//! ```
//! Everything that can be found wrong without the daemon is found here, all of it at once, before
//! anything is started. `docs/fermata-toml.md` is the reference; a test reads its example.

mod agent;
pub mod environment;
pub mod order;

mod problems;
mod section;
mod settings;
pub mod source_file;
mod supervision;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use fermata_protocol::project::ProjectConfig;
use fermata_protocol::supervision::Supervision;
use fermata_protocol::{AgentName, ProjectName};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::errors::Failure;
use environment::Environment;
use problems::Problem;
use section::{Problems, Section};
use source_file::Source;
use tree::{Kind, Member};

/// What a file declares, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Declaration {
    /// The file.
    pub file: PathBuf,
    /// The workspace: the directory of the file.
    pub workspace: PathBuf,
    /// The project.
    pub project: ProjectName,
    /// What it is for, where the file says so.
    pub description: Option<String>,
    /// Its settings, where the file has any.
    pub config: Option<ProjectConfig>,
    /// The agents.
    pub agents: BTreeMap<AgentName, DeclaredAgent>,
}

/// An agent that a file declares.
#[derive(Debug, Clone, PartialEq)]
pub struct DeclaredAgent {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// The working directory, absolute.
    pub cwd: PathBuf,
    /// The environment.
    pub env: Environment,
    /// The profile that knows the tool.
    pub profile: Option<String>,
    /// The program and arguments that bring it back.
    pub resume_argv: Option<Vec<String>>,
    /// Between SIGTERM and SIGKILL, milliseconds.
    pub stop_grace_ms: Option<u64>,
    /// How it is looked after.
    pub supervision: Supervision,
}

impl DeclaredAgent {
    /// Returns the SHA-256 of what is declared, in hexadecimal: the same for the same meaning,
    /// however it is written. Of variables only the names count here; their values are compared by
    /// the daemon, which keeps them.
    pub fn digest(&self) -> String {
        let text = json!({
            "argv": self.argv,
            "cwd": self.cwd.to_string_lossy(),
            "variables": self.env.set.keys().collect::<Vec<_>>(),
            "pass_env": self.env.pass,
            "profile": self.profile,
            "resume_argv": self.resume_argv,
            "stop_grace_ms": self.stop_grace_ms,
            "supervision": self.supervision,
        })
        .to_string();
        Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Reads what a file says.
///
/// # Errors
/// All problems of the file, with their places.
pub fn read(source: &Source) -> Result<Declaration, Failure> {
    understand(&source.text, &source.file, &source.workspace)
        .map_err(|found| problems::failure(&source.file.to_string_lossy(), &source.text, found))
}

fn understand(text: &str, file: &Path, workspace: &Path) -> Result<Declaration, Vec<Problem>> {
    // What a broken syntax leaves over would only be complained about once more.
    let table = tree::parse(text)?;
    let problems = Problems::default();
    let mut root = Section::new(String::new(), 0..0, &table, &problems);
    let about = project(root.member("project"), workspace, &problems);
    let agents = agents(root.member("agents"), workspace, &problems);
    daemon_settings(&mut root);
    root.finish();
    match about {
        Some((project, description, config)) if problems.is_empty() => Ok(Declaration {
            file: file.to_owned(),
            workspace: workspace.to_owned(),
            project,
            description,
            config,
            agents,
        }),
        _ => Err(problems.into_inner()),
    }
}

/// The daemon's own file has the same name; whoever mixes them up is told.
fn daemon_settings(root: &mut Section<'_>) {
    for key in ["log", "operator_group", "others_may_look", "on_shutdown", "pause", "context"] {
        if let Some(member) = root.members().get(key) {
            root.member(key);
            root.problem_with_hint(
                &member.key.clone(),
                key,
                format!("'{key}' is a setting of the daemon, not of a workspace"),
                "it belongs into the daemon's own file: /etc/fermata/fermata.toml, or ~/.config/fermata/fermata.toml",
            );
        }
    }
    for key in ["checkpoint", "checkpoints"] {
        if let Some(member) = root.members().get(key) {
            root.member(key);
            root.problem_with_hint(
                &member.key.clone(),
                key,
                "when checkpoints are taken, and how many are kept, cannot be set in this version",
                "what they cover can: [project.config] has include, exclude, use_gitignore and max_file_bytes",
            );
        }
    }
}

type About = (ProjectName, Option<String>, Option<ProjectConfig>);

fn project(member: Option<&Member>, workspace: &Path, problems: &Problems) -> Option<About> {
    let mut description = None;
    let mut config = None;
    let mut named = None;
    let mut span = 0..0;
    if let Some(member) = member {
        span = member.key.clone();
        if let Kind::Text(name) = &member.node.kind {
            named = Some((name.clone(), member.node.span.clone(), "project"));
        } else {
            let mut section = Section::of("project".into(), member, problems)?;
            named = section.text("name").map(|name| (name.value, name.span, "project.name"));
            description = section.text("description").map(|text| text.value);
            config = section.member("config").and_then(|member| settings::read(member, problems));
            let given = section.members().contains_key("name");
            section.finish();
            if given && named.is_none() {
                return None;
            }
        }
    }
    let name = match named {
        Some((name, span, key)) => {
            ProjectName::new(name).map_err(|error| problems.add(Problem::new(span, key, error.to_string()))).ok()
        }
        None => {
            let name = name_of(workspace);
            if name.is_none() {
                let message = format!("no name can be made of the directory {}", workspace.display());
                problems.add(Problem::new(span, "project.name", message).hint("write [project] with name = \"…\""));
            }
            name
        }
    };
    Some((name?, description, config))
}

/// Makes a project's name of a directory's.
fn name_of(workspace: &Path) -> Option<ProjectName> {
    let name = workspace.file_name()?.to_string_lossy();
    let fitting = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' };
    let name: String = name.chars().map(fitting).collect();
    let name: String = name.trim_start_matches(['.', '_', '-']).chars().take(64).collect();
    ProjectName::new(name.trim_end_matches('-')).ok()
}

fn agents(member: Option<&Member>, workspace: &Path, problems: &Problems) -> BTreeMap<AgentName, DeclaredAgent> {
    let mut agents = BTreeMap::new();
    let Some(section) = member.and_then(|member| Section::of("agents".into(), member, problems)) else { return agents };
    let mut declared = BTreeSet::new();
    let mut wishes = order::Wishes::new();
    for (written, member) in section.members() {
        let name = AgentName::new(written.clone()).map_err(|error| {
            section.problem(&member.key, written, error.to_string());
        });
        // One that cannot be read, or has no good name, is there nevertheless for those that wait for it.
        declared.extend(name.clone());
        let Some(table) = Section::of(section.path_of(written), member, problems) else { continue };
        let (agent, depends_on) = agent::read(table, workspace);
        let Ok(name) = name else { continue };
        wishes.insert(name.clone(), depends_on);
        agents.extend(agent.map(|agent| (name, agent)));
    }
    order::check(&wishes, &agents, &declared, problems);
    agents
}

#[cfg(test)]
mod tests;
