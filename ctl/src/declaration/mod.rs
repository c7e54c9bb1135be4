//! The `fermata.toml` of a workspace: the project and the agents that it declares.
//!
//! ```text
//!   source_file ─► text ─► tree ─► section by section ─► Declaration
//!                            │            │      ▲
//!                            └─ problems ◄┘      order: names, cycles
//! ```
//! All errors that can be detected without the daemon are reported at once, before anything is started.
//! `docs/fermata-toml.md` is the reference; a test reads its example.

mod agent;
mod environment;
mod model;
pub mod order;

mod problems;
mod section;
mod settings;
pub mod source_file;
mod supervision;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use fermata_protocol::project::ProjectConfig;
use fermata_protocol::{AgentName, ProjectName};

pub use model::{Declaration, DeclaredAgent};

use crate::errors::CommandError;
use problems::Problem;
use section::{Problems, Section};
use source_file::SourceFile;
use tree::{TomlEntry, TomlValue};

/// Parses and checks a file.
///
/// # Errors
/// All problems of the file, with their locations.
pub fn read(source: &SourceFile) -> Result<Declaration, CommandError> {
    parse(&source.text, &source.file, &source.workspace)
        .map_err(|list| problems::into_error(&source.file.to_string_lossy(), &source.text, list))
}

fn parse(text: &str, file: &Path, workspace: &Path) -> Result<Declaration, Vec<Problem>> {
    // With a syntax error the other checks would only report follow-up errors.
    let table = tree::parse(text)?;
    let problems = Problems::default();
    let mut root = Section::new(String::new(), 0..0, &table, &problems);
    let project = project(root.member("project"), workspace, &problems);
    let agents = agents(root.member("agents"), workspace, &problems);
    daemon_settings(&mut root);
    root.finish();
    match project {
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

/// Reports settings that belong into the file of the daemon, which has the same name.
fn daemon_settings(root: &mut Section<'_>) {
    for key in ["log", "operator_group", "others_may_look", "on_shutdown", "pause", "context"] {
        if let Some(member) = root.members().get(key) {
            root.member(key);
            root.problem_with_hint(
                &member.key.clone(),
                key,
                format!("'{key}' is a setting of the daemon, not of a workspace"),
                "move it to the file of the daemon: /etc/fermata/fermata.toml or ~/.config/fermata/fermata.toml",
            );
        }
    }
    for key in ["checkpoint", "checkpoints"] {
        if let Some(member) = root.members().get(key) {
            root.member(key);
            root.problem_with_hint(
                &member.key.clone(),
                key,
                format!("'{key}' is not supported"),
                "settings of checkpoints are in [project.config]: automatic, retention, include, exclude and others",
            );
        }
    }
}

type ProjectSection = (ProjectName, Option<String>, Option<ProjectConfig>);

fn project(member: Option<&TomlEntry>, workspace: &Path, problems: &Problems) -> Option<ProjectSection> {
    let mut description = None;
    let mut config = None;
    let mut named = None;
    let mut span = 0..0;
    if let Some(member) = member {
        span = member.key.clone();
        if let TomlValue::Text(name) = &member.node.kind {
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
                let message = format!("the directory name of {} is not usable as a project name", workspace.display());
                problems.add(Problem::new(span, "project.name", message).hint("write [project] with name = \"…\""));
            }
            name
        }
    };
    Some((name?, description, config))
}

/// Derives a project name from the name of the workspace.
fn name_of(workspace: &Path) -> Option<ProjectName> {
    let name = workspace.file_name()?.to_string_lossy();
    let valid = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' };
    let name: String = name.chars().map(valid).collect();
    let name: String = name.trim_start_matches(['.', '_', '-']).chars().take(64).collect();
    ProjectName::new(name.trim_end_matches('-')).ok()
}

fn agents(member: Option<&TomlEntry>, workspace: &Path, problems: &Problems) -> BTreeMap<AgentName, DeclaredAgent> {
    let mut agents = BTreeMap::new();
    let Some(section) = member.and_then(|member| Section::of("agents".into(), member, problems)) else { return agents };
    let mut declared = BTreeSet::new();
    let mut graph = order::DependencyGraph::new();
    for (written, member) in section.members() {
        let name = AgentName::new(written.clone()).map_err(|error| {
            section.problem(&member.key, written, error.to_string());
        });
        // Invalid agents count as declared, so that dependencies on them are not reported as unknown.
        declared.extend(name.clone());
        let Some(table) = Section::of(section.path_of(written), member, problems) else { continue };
        let (agent, depends_on) = agent::read(table, workspace);
        let Ok(name) = name else { continue };
        graph.insert(name.clone(), depends_on);
        agents.extend(agent.map(|agent| (name, agent)));
    }
    order::check(&graph, &agents, &declared, problems);
    agents
}

#[cfg(test)]
mod tests;
