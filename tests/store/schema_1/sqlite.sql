CREATE TABLE artifact (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	kind VARCHAR(100) NOT NULL, 
	path TEXT NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	meta JSON, 
	PRIMARY KEY (id), 
	UNIQUE (study_id, kind, path), 
	FOREIGN KEY(study_id) REFERENCES study (id)
);
CREATE TABLE behavior (
	evaluation_id INTEGER NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	value DOUBLE NOT NULL, 
	definition JSON, 
	PRIMARY KEY (evaluation_id, name), 
	FOREIGN KEY(evaluation_id) REFERENCES evaluation (id)
);
CREATE TABLE contributor (
	study_id INTEGER NOT NULL, 
	contributor_idx INTEGER NOT NULL, 
	contributor_name TEXT NOT NULL, 
	n_examples INTEGER NOT NULL, 
	PRIMARY KEY (study_id, contributor_idx), 
	FOREIGN KEY(study_id) REFERENCES study (id)
);
CREATE TABLE evaluation (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	identity VARCHAR(64) NOT NULL, 
	exp_name TEXT NOT NULL, 
	dataset TEXT NOT NULL, 
	method TEXT NOT NULL, 
	removal_dist TEXT, 
	datamodel_alpha DOUBLE, 
	removal_seed INTEGER, 
	role TEXT, 
	coalition TEXT NOT NULL, 
	opt_seed INTEGER NOT NULL, 
	settings JSON NOT NULL, 
	priority INTEGER NOT NULL, 
	status VARCHAR(8) NOT NULL, 
	attempts INTEGER NOT NULL, 
	error TEXT, 
	owner JSON, 
	owner_token VARCHAR(32), 
	lease_expires DOUBLE, 
	created DOUBLE NOT NULL, 
	started DOUBLE, 
	finished DOUBLE, 
	seconds JSON, 
	provenance JSON, 
	PRIMARY KEY (id), 
	UNIQUE (study_id, identity), 
	CHECK (status IN ('pending', 'running', 'finished', 'failed')), 
	FOREIGN KEY(study_id) REFERENCES study (id)
);
CREATE TABLE study (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	dataset TEXT NOT NULL, 
	fingerprint TEXT NOT NULL, 
	config JSON, 
	created DOUBLE NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (name, dataset)
);
CREATE TABLE tribute_schema (
	version INTEGER NOT NULL
);
CREATE INDEX evaluation_by_status ON evaluation (status, priority, id);
